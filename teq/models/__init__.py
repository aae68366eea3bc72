from teq.models.arch import Arch
from teq.models.checkpoint import LM, Checkpoint
from teq.models.folder import Folder
from teq.models.hub import Hub
from teq.models.synthetic import Outline, Random, Synthetic
from teq.models.wheel import Wheel

__all__ = ["LM", "Arch", "Checkpoint", "Folder", "Hub", "Outline", "Random", "Synthetic", "Wheel"]
