from teq.models.arch import Arch
from teq.models.checkpoint import LM, Checkpoint, Folder, Hub, Outline, Random, Synthetic, Wheel

__all__ = ["LM", "Arch", "Checkpoint", "Folder", "Hub", "Outline", "Random", "Synthetic", "Wheel"]
