"""What graftune costs beside HF PEFT: each benchmark measures both in one run and prints the ratio.

    python -m benchmarks                     all of them, in under ten minutes
    python -m benchmarks lora_call load_100  some
    python -m benchmarks --json out.json --write

CPU seconds of one thread, user and system; the two sides take turns within each round, so that what
else the machine does falls on both. A ratio is the median over rounds, with its least and largest.
"""
