import mmpeft as mmpeft  # first of all: it makes torchvision importable beside a CPU torch
