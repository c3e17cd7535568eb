import random

from clip_pgs.evaluation import EvalSet, load_suite
from clip_pgs.evaluation.runner import divide, seconds_left, sizes_to_read


def sets(count):
    return [EvalSet(str(n), f"folder{n}", "a suite", "a task") for n in range(count)]


def test_largest_set_goes_first_to_the_rank_with_the_least():
    # 9 and 8 open the two ranks; 4 joins 8, then 3 joins 9, then 1 the equal sum of rank 0.
    assert divide(sets(5), [3, 9, 1, 8, 4], 2) == [[0, 1, 2], [3, 4]]


def test_every_set_goes_to_one_rank_and_loads_differ_by_one_set_at_most():
    dice = random.Random(0)
    for world_size in (1, 2, 3, 8):
        sizes = [dice.randrange(1, 100) for _ in range(20)]
        shares = divide(sets(20), sizes, world_size)
        assert sorted(number for share in shares for number in share) == list(range(20))
        loads = [sum(sizes[number] for number in share) for share in shares]
        assert max(loads) - min(loads) <= max(sizes)


def test_sets_of_unknown_size_are_spread_by_number():
    assert [len(share) for share in divide(sets(8), [None] * 8, 4)] == [2, 2, 2, 2]


def test_suites_that_read_one_folder_stay_together_and_it_is_counted_once(data_root, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("six\npairs\nrobustness: six\nlinear-probe: six\nsugar_crepe/add_att\n")
    eval_sets = load_suite(datasets=str(path), data_root=str(data_root))
    sizes = sizes_to_read(eval_sets)
    ranks = divide(eval_sets, sizes, 2)
    locations = [{eval_sets[number].location for number in numbers} for numbers in ranks]
    assert not locations[0] & locations[1]
    assert sorted(number for numbers in ranks for number in numbers) == list(range(5))
    by_suite = {s.suite: size for s, size in zip(eval_sets, sizes, strict=True)}
    assert by_suite["robustness"] == 0  # read for zero-shot classification before
    assert by_suite["zeroshot-classification"] > (data_root / "six/test/0.tar").stat().st_size


def test_time_left_follows_from_the_bytes_of_what_was_work():
    assert seconds_left(10.0, 100, [500, 200, 300]) == 10.0 / 100 * 1000
    assert seconds_left(30.0, 300, [300]) == 30.0


def test_time_left_is_not_guessed_where_a_size_is_unknown():
    assert seconds_left(10.0, 100, [100, None]) is None
    assert seconds_left(0.0, 0, [100]) is None
    assert seconds_left(10.0, 100, []) is None
