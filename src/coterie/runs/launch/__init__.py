"""Starting the processes of one run, and stopping them with the one that started them."""

from coterie.runs.launch.supervisor import Hung, launch, planned

__all__ = ["Hung", "launch", "planned"]
