"""common.py: files that are whole or absent, one writer per output, errors in one line; and the identity of images."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import PATIENCE, wait_until

from common import Parser, UserError, claim_output, one_line_errors, replace_file
from features.image_ids import id_key, match_ids, name_images

ROOT = Path(__file__).resolve().parent.parent


def write(path, content=b"new"):
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(workdir):
    Path("out").write_bytes(b"old")
    write("out")
    assert Path("out").read_bytes() == b"new"
    assert os.listdir() == ["out"]


def test_a_failed_write_keeps_the_old_file(workdir):
    Path("out").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replace_file("out") as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert Path("out").read_bytes() == b"old"
    assert os.listdir() == ["out"]


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


@pytest.mark.parametrize("make", [make_fifo, make_socket, os.mkdir])
@pytest.mark.parametrize("through_link", [False, True])
def test_what_is_no_regular_file_is_refused_and_left_alone(workdir, make, through_link):
    make("there")
    before = os.stat("there")
    if through_link:
        os.symlink("there", "link")
    with pytest.raises(UserError, match="expected a regular file or a new name"):
        write("link" if through_link else "there")
    assert stat.S_IFMT(os.stat("there").st_mode) == stat.S_IFMT(before.st_mode)
    assert os.stat("there").st_ino == before.st_ino


def test_a_symbolic_link_stays_and_its_target_is_written(workdir):
    os.mkdir("elsewhere")
    Path("elsewhere/target").write_bytes(b"old")
    os.symlink("elsewhere/target", "link")
    write("link")
    assert os.path.islink("link")
    assert Path("elsewhere/target").read_bytes() == b"new"


def test_what_a_killed_writer_left_is_removed_by_the_next(workdir):
    code = "from common import replace_file; import os, signal\nwith replace_file('out'): os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir()) == 1, "the killed writer was expected to leave its temporary file"
    write("out")
    assert os.listdir() == ["out"]


def test_what_a_killed_run_left_is_removed_by_the_next_that_claims_its_output(workdir):
    code = "from common import replace_file; import os, signal\nwith replace_file('run_log'): os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    Path(".run_mine.tmp").touch()
    with claim_output("run"):
        assert sorted(os.listdir()) == [".run.lock", ".run_mine.tmp"]


HOLD = "from common import claim_output; import time\nwith claim_output('out'):\n    open('ready', 'w').close()\n    time.sleep(600)"


@pytest.fixture
def holder(workdir):
    """A process that holds the claim on `out`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_until(Path("ready").exists)
    yield process
    process.kill()
    process.wait()


def test_a_second_writer_is_told_who_the_first_is(holder):
    with pytest.raises(UserError) as error, claim_output("out"):
        pass
    assert f"process {holder.pid} on {socket.gethostname()}" in str(error.value)


def test_the_claim_of_a_killed_process_is_taken_over(holder):
    holder.kill()
    holder.wait()
    with claim_output("out"):
        pass
    assert os.listdir() == ["ready"]


RACE = """
import sys
from common import claim_output, one_line_errors, replace_file

@one_line_errors
def main(argv):
    with claim_output("out.txt"), replace_file("out.txt") as temporary, open(temporary, "w") as file:
        for number in range(300):
            print(argv[0], number, file=file, flush=True)

main(sys.argv[1:])
"""


@pytest.mark.slow
def test_of_two_runs_at_once_one_writes_and_the_other_names_it_fifty_times(workdir):
    Path("race.py").write_text(RACE)
    lost = 0
    for _ in range(50):
        settings = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "stderr": subprocess.PIPE, "text": True}
        runs = [subprocess.Popen([sys.executable, "race.py", name], **settings) for name in "ab"]
        errors = [process.communicate(timeout=PATIENCE)[1] for process in runs]
        codes = [process.returncode for process in runs]
        assert sorted(codes) in ([0, 0], [0, 2]), errors
        winner = codes.index(0)
        if 2 in codes:
            lost += 1
            line = f"race.py: error: out.txt is being written by process {runs[winner].pid} on {socket.gethostname()} since "
            assert errors[1 - winner].startswith(line)
            assert len(errors[1 - winner].splitlines()) == 1
        names = {line.split()[0] for line in Path("out.txt").read_text().splitlines()}
        assert len(names) == 1
        assert 2 not in codes or names == {"ab"[winner]}
        assert sorted(os.listdir()) == ["out.txt", "race.py"]
    assert lost, "the two runs never met"


def test_where_a_file_system_has_no_locks_a_line_says_so(workdir, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("common.fcntl.lockf", refuse)
    with claim_output("out"):
        Path("out").write_text("mine")
    assert "file system without locks" in capsys.readouterr().err
    assert os.listdir() == ["out"]


def test_a_process_does_not_claim_one_output_twice(workdir):
    with claim_output("out"), pytest.raises(UserError, match="by this process"), claim_output("./out"):
        pass


def parser():
    made = Parser(prog="script.py", description="What it does.")
    made.add_argument("files", nargs="+", metavar="FILE")
    made.add_argument("--count", type=int)
    made.add_argument("--rate", type=float)
    return made


@pytest.mark.parametrize("words, message", [
    (["a\0b"], "NUL byte"),
    (["a", "--count", str(2**70)], "expected at most"),
    (["a", "--rate", "1e400"], "expected a finite number"),
    (["a", "--rate", "nan"], "expected a finite number"),
    (["a", "--cuont", "1"], "did you mean --count?"),
    (["\ud800"], "half a surrogate pair"),
])  # fmt: skip
def test_values_that_nothing_can_use_are_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        parser().parse_args(words)
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_usage_line_is_short():
    assert parser().format_help().splitlines()[0] == "usage: script.py [options] FILE [FILE ...]"


def test_a_terminal_without_a_character_gets_it_escaped(workdir):
    code = "import sys; sys.path.insert(0, %r)\nfrom common import one_line_errors\n" % str(ROOT)
    code += "def main(argv): print('caf\\u00e9 \\u2192 \\U0001f4f7')\nsys.modules['__main__'].__file__ = 'x.py'\none_line_errors(main)([])"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"caf\\xe9 \\u2192 \\U0001f4f7\n"


def test_one_line_errors_keeps_the_exit_code():
    assert one_line_errors(lambda argv: None)([]) == 0


def test_ids_are_cocos_numbers_or_paths_within_the_folder():
    paths = ["d/COCO_val2014_000000391895.jpg", "d/a/cat.jpg", "d/b/cat.jpg", "d/cat.png", "d/cat.jpg"]
    assert name_images(paths, ["d"] * 5) == [391895, "a/cat.jpg", "b/cat.jpg", "cat.png", "cat.jpg"]


def test_files_given_by_name_have_their_names_as_long_as_these_differ():
    assert name_images(["x/1.jpg", "y/2.jpg"]) == ["1.jpg", "2.jpg"]
    assert name_images(["x/1.jpg", "y/1.jpg"]) == ["x/1.jpg", "y/1.jpg"]


def test_one_number_for_two_pictures_is_no_id():
    assert name_images(["d/a/000000000001.jpg", "d/b/000000000001.jpg"], ["d", "d"]) == ["a/000000000001.jpg", "b/000000000001.jpg"]


NAMES = "a b ab a.jpg a.png b.jpg x/a.jpg y/a.jpg 000000000001.jpg x/000000000001.jpg COCO_val2014_000000000001.jpg".split()
NAMES = st.lists(st.sampled_from(NAMES), unique=True)


@given(NAMES)
def test_different_files_have_different_ids_and_keys(names):
    ids = name_images([f"d/{name}" for name in names], ["d"] * len(names))
    assert len(set(ids)) == len(names)
    # COCO's two names of one picture, found in one folder, are the same picture to every other file.
    keys = {id_key(one) for one in ids}
    assert len(keys) >= len(names) - 1


@given(NAMES, NAMES)
def test_a_match_is_one_to_one_and_equal_keys_match(names, others):
    keys, known = list(map(id_key, names)), list(map(id_key, others))
    matched = match_ids(keys, known)
    assert len(set(matched.values())) == len(matched)
    assert all(matched[key] == key for key in keys if key in known)


COCO_FORMS = ["COCO_train2014_000000000042.jpg", "000000000042", "coco_42", 42, "train2014\\COCO_train2014_000000000042.jpg"]


@pytest.mark.parametrize("image_id", COCO_FORMS)
def test_the_forms_of_a_coco_id_are_one(image_id):
    assert id_key(image_id) == "42"


def test_stems_match_where_one_picture_can_be_meant():
    assert match_ids(["cat", "dog", "bird"], ["a/cat.jpg", "dog.jpg", "dog.png"]) == {"cat": "a/cat.jpg"}
