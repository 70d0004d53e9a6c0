"""How deep in a backbone a parameter is: for lower layers that are frozen, or that learn more slowly."""

from torch import nn


def depths(tower: nn.Module) -> dict[str, int]:
    """Of each parameter by name: 0 below the stack of layers, 1..L its layer, L + 1 above. L is `num_layers`.

    The stack is the list of modules with the most parameters; what is registered before it counts as below, and so does
    a batch norm: CLAP's is that of its input.
    """
    where, layers = _stack(tower)
    found, passed = {}, False
    norms = [name for name, module in tower.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for name, _ in tower.named_parameters():
        inside = name.startswith(f"{where}.")
        passed = passed or inside
        if name.rsplit(".", 1)[0] in norms:
            found[name] = 0
        elif inside:
            found[name] = 1 + int(name.removeprefix(f"{where}.").split(".")[0])
        else:
            found[name] = len(layers) + 1 if passed else 0
    return found


def num_layers(tower: nn.Module) -> int:
    """L."""
    return len(_stack(tower)[1])


def rate_scales(tower: nn.Module, layer_decay: float) -> dict[str, float]:
    """The share of the learning rate of each parameter: layer_decay to the power of its distance from the top."""
    top = num_layers(tower) + 1
    return {name: layer_decay ** (top - depth) for name, depth in depths(tower).items()}


def freeze_lowest(tower: nn.Module, layers: int) -> None:
    """Takes the gradient from so many of the lowest layers and from what is below them; 0 = from nothing."""
    if layers:
        for name, depth in depths(tower).items():
            if depth <= layers:
                tower.get_parameter(name).requires_grad_(False)


def _stack(tower: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [(name, module) for name, module in tower.named_modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))
