"""The rows of docs/DRILLS.md, on real servers. `stack` is the Airflow and the Ray head of all of them, `proxy` the
line that can be cut.

    test_faults      Airflow, Ray, and the way between them     chaos_dags, job, training, mapped
    test_drills      the store, workers' machines, clocks       drills, drill_dags, machine
    test_services    Postgres, MLflow, the Ray head             services, slow, run_records
    test_two_nodes   a node is cut off and comes back           namespaces, cluster, slow, run_records
    test_partition   two machines no longer reach each other    the same
"""
