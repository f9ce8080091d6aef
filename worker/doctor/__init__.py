"""`manyhands worker doctor`: what this machine can give a run, measured, and what to do where something is in the way.

Each check gives findings; none changes anything on this machine. Without `--join` the coordinator is only looked at
from outside: the run's model, and transfers, are for those who have joined (see worker.doctor.joined).
"""
