"""What several questions share: the setting, data and probes, evidence, paths and tables."""
