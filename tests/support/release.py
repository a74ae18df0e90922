"""Slow tests beside which a sibling checks the same way with another option: these run before a release alone."""

from __future__ import annotations

_FAULTS, _TWO = "run/test_faults.py::test_", "run/test_distributed.py::test_two_processes_equal_one_"
SIBLINGS = (
    *(f"{_FAULTS}killed_while_saving[{at}]" for at in ("optimizer", "random state", "facts of the run", "rotation")),
    *(f"{_FAULTS}a_full_disk_says_so_and_leaves_the_last_checkpoint[{at}]" for at in ("teacher", "optimizer")),
    f"{_FAULTS}a_full_disk_at_the_end_loses_no_training[second save]",
    *(f"{_TWO}with_the_whole_batch[{row}]" for row in ("flyp-options2", "lp-ft-options3")),
    f"{_TWO}for_other_families[chinese_clip]",
    "objective/test_gradient_cache.py::test_two_processes_with_the_cache_equal_one_without[tracer]",
    "hub/test_hub.py::test_a_checkpoint_from_the_hub_is_complete_at_each_commit_and_goes_on[1]",
    "examples/test_tables.py::test_the_page_holds_every_figure_that_was_measured[False]",
    "run/test_precision.py::test_compilation_gives_the_same_weights[cache]",
    "suites/test_streaming.py::test_two_processes_find_the_same_metrics[True-0]",
    "suites/test_streaming.py::test_two_processes_find_the_same_metrics[False-0]",
    "run/test_resume_facts.py::test_another_batch_from_the_end_of_an_epoch_on[length1]",
    *(f"ece/test_interval.py::test_coverage[2000-{true}-{kind}]" for true in ("0.0", "0.01", "0.05", "0.1")
      for kind in ("flat", "high")),
)  # fmt: skip
