"""Samples and lengths per source of a data set, as Table 4 of arXiv 2502.01968 states them.

    python scripts/pool_statistics.py --tokenizer meta-llama/Llama-3.2-3B jlpang888/DS2_50k

Prompt, completion and overall length are means in tokens before truncation, template included.
"""

from __future__ import annotations

import argparse
import logging

from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.pool import statistics_table
from tokenclean.models import BaseConfig, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", nargs="+", help="files, folders or hub names")
    parser.add_argument("--tokenizer", required=True, help="local path or hub name")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--on-bad-line", choices=("stop", "skip"), default="stop")
    parser.add_argument("--cache-dir", default="outputs/cache")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    try:
        data = TuluDataModule(
            path=args.path,
            max_length=args.max_length,
            on_bad_line=args.on_bad_line,
            cache_dir=args.cache_dir,
        )
        data.use_tokenizer(load_tokenizer(BaseConfig(name=args.tokenizer)))
        data.prepare_data()
        data.setup()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(statistics_table(data.pool))


if __name__ == "__main__":
    main()
