"""Jobs and replicas on a cluster (extra `ray`).

node     a model's directory, once a node   cluster   engines for Ray Data
files    lines for Ray Data                 spread    a job on a cluster
replicas the service on Ray Serve
"""
