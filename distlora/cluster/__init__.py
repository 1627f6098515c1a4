"""Everything about many processes on many hosts. Knows nothing of models, methods, recipes and training.

rendezvous, topology, nodelist, mpi      who this process is, and where the ranks meet
supervision, heartbeat, stopping         the ranks together: start, silent ranks, requests to stop, end
status, logs, environment                what a run leaves in its directory about its course
lease                                    which start owns a run directory
launching, hostfile, ssh, addresses,
exported_variables, packed_command       what launch scripts and the doctor need to reach hosts
confidential                             which names and texts hold secrets

The training uses `Supervision`, `StatusFile`, `Lease`, `RankLog` and `environment`. The command line uses
`topology_from_environment`, `StopSignals`, `read_status`, `living_owner` and `launching.prepare`. The doctor
also uses the modules that reach hosts. `rendezvous`, `stopping`, `status`, `lease` and `launching` do not
import torch, because launch scripts and signals cannot wait for it.
"""
