"""Program of ``test_ngram``: greedy tokens and counts of drafts of a speculating engine."""

import ast
import sys

from tests.vllm_thinkfast.models.engines import EnginePool, greedy


def main() -> None:
    """Reads (prompts, number of tokens) from stdin, prints (tokens, drafted, accepted)."""
    prompts, num_tokens = ast.literal_eval(sys.stdin.read())
    settings = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    pool = EnginePool()
    llm = pool.get(
        sys.argv[1], max_num_seqs=4, speculative_config=settings, disable_log_stats=False
    )
    tokens = greedy(llm, prompts, num_tokens)
    counts = {
        m.name: m.value
        for m in llm.get_metrics()
        if m.name.startswith("vllm:spec_decode") and hasattr(m, "value")
    }
    drafted = int(counts["vllm:spec_decode_num_draft_tokens"])
    accepted = int(counts["vllm:spec_decode_num_accepted_tokens"])
    sys.stdout.write(f"RESULT {(tokens, drafted, accepted)}\n")
    pool.close()


if __name__ == "__main__":
    main()
