r"""Capture a teacher's logits over a dataset into one HDF5 file.

    accelerate launch --config_file accelerate_configs/cpu.yaml generate.py \
        --teacher M --dataset D --split S --output out.h5

The run itself is told in logitgen/generate.py. An installed package starts it with
`accelerate launch -m logitgen.generate`.
"""

import gc

gc.disable()  # looking for garbage, of which there is none yet, takes a quarter of the time of all imports

from logitgen.generate import main  # noqa: E402

gc.freeze()
gc.unfreeze()  # now all of it is old, or else the collector would look through it as young and as middle-aged too
gc.enable()

if __name__ == "__main__":
    main()
