import torch
from torch import nn

from thinkfast_distill.freeze import freeze_table


def test_freeze_table_counts_trained_frozen_and_decayed():
    shapes = {
        "model.embed_tokens.weight": (5, 4),
        "model.layers.0.input_layernorm.weight": (4,),
        "model.layers.0.mixer.in_proj.weight": (6, 4),
        "model.layers.0.mixer.out_proj.weight": (4, 4),
        "model.layers.0.mixer.conv1d.weight": (6, 1, 4),
        "model.layers.0.mixer.D": (2,),
        "model.layers.0.mlp.up_proj.weight": (8, 4),
    }
    parameters = {name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}
    trained = [name for name in shapes if ".mixer." in name or ".mlp." in name]
    no_decay = ["model.layers.0.mixer.in_proj.weight"]
    assert [line.split() for line in freeze_table(parameters.items(), trained, no_decay)] == [
        ["part", "trained", "frozen", "weight", "decay"],
        ["embedding", "0", "20", "0"],
        ["ssm", "66", "0", "16"],  # neither D nor convolution decays, nor what the stage exempts
        ["mlp", "32", "0", "32"],
        ["norm", "0", "4", "0"],
        ["all", "98", "24", "48"],
    ]
