r"""Capture a teacher's logits over a dataset into one HDF5 file.

    accelerate launch --config_file accelerate_configs/cpu.yaml generate.py \
        --teacher M --dataset D --split S --output out.h5

The run itself is told in logitgen/generate.py. An installed package starts it with
`accelerate launch -m logitgen.generate`.
"""

from logitgen.generate import main

if __name__ == "__main__":
    main()
