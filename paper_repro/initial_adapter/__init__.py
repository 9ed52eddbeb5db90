"""Does a probe hold on another initial adapter, rank and choice of modules than its training's?"""
