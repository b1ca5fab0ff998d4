from sphere_kernels._backends.native import View

emulated: bool

def device_count() -> int: ...
def toolkit() -> int: ...
def architectures() -> list[int]: ...
def pair_energy_workspace(weight: View, s: float, angular: bool, half_space: bool) -> int: ...
def pair_energy(
    weight: View,
    s: float,
    angular: bool,
    half_space: bool,
    precision: int,
    workspace: int,
    energies: int,
    stream: int,
) -> None: ...
def gram_update_energy_workspace(gram: View, first: View) -> int: ...
def gram_update_energy(
    gram: View,
    first: View,
    second: View,
    diagonal: int,
    weight: View | None,
    s: float,
    angular: bool,
    half_space: bool,
    precision: int,
    workspace: int,
    energies: int,
    stream: int,
) -> None: ...
def product(
    left: View,
    right: View,
    addend: View | None,
    out: View,
    factor: float,
    accumulate: bool,
    wide: bool,
    precision: int,
    stream: int,
) -> None: ...
