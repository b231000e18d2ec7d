"""What all optimisers share that evaluate the model themselves: they belong to it as it was when they were made."""

from typing import Any, NoReturn

import torch


class OptimizerOfModel(torch.optim.Optimizer):
    """An optimiser of one group, the parameters of its model; it cannot be copied."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the parameters are those of the model.

        Raises:
            ValueError: always, once the optimiser is made.
        """
        if self.param_groups:
            raise ValueError(
                f"add_param_group: {type(self).__name__} trains the parameters that its model had when it was made, in "
                "one group; make a new optimiser for the model as it is now"
            )
        super().add_param_group(param_group)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refused: PyTorch's would leave out all but groups and state.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{type(self).__name__} belongs to the model that it evaluates and cannot be copied; make a new one for "
            "the copied model and load this one's state_dict()"
        )
