"""fastgen beside its peers: one driver, one adapter an engine, one environment an engine."""
