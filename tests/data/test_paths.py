import os
from pathlib import Path

import pytest

from clvr_train.data.paths import new_folder, path_inside
from clvr_train.data.records import FieldError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "images/a.png").touch()
    (tmp_path / "secret").touch()
    (root / "out").symlink_to(tmp_path)
    (root / "out.png").symlink_to(tmp_path / "secret")
    (root / "in.png").symlink_to("images/a.png")
    (root / "loop").symlink_to("loop")
    (root / "100 percent, ünïcode.png").touch()
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize("value", ["images/a.png", "./images//a.png", "images/../images/a.png", "in.png",
                                   "100 percent, ünïcode.png"])  # fmt: skip
def test_files_inside(folder: Path, value: str) -> None:
    assert path_inside(value, "images[1]", folder) == folder / value
    os.chdir(folder)
    assert path_inside(value, "images[1]", Path(".")).is_file()


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("../secret", "outside_root"),
        ("images/../../secret", "outside_root"),
        ("out/secret", "outside_root"),
        ("out.png", "outside_root"),
        ("/etc/passwd", "outside_root"),
        ("//etc/passwd", "outside_root"),
        ("C:\\x.png", "outside_root"),
        ("c:x.png", "outside_root"),
        ("\\\\host\\share\\x.png", "outside_root"),
        ("..\\secret", "outside_root"),
        ("%2e%2e/secret", "outside_root"),
        ("%2E%2E%2fsecret", "outside_root"),
        ("%252e%252e/secret", "outside_root"),
        ("images/a.png%00.jpg", "outside_root"),
        ("images/a.png\0", "outside_root"),
        ("http://localhost/a.png", "url"),
        ("HTTPS://a.b/c.png", "url"),
        ("s3://bucket/a.png", "url"),
        ("file:///etc/passwd", "url"),
        ("file:a.png", "url"),
        ("pipe:cat /etc/passwd", "url"),
        ("data:image/png;base64,AAAA", "url"),
        ("images/none.png", "missing_image"),
        ("images", "missing_image"),
        (".", "missing_image"),
        ("pipe", "missing_image"),
        ("loop", "missing_image"),
        ("x" * 5000, "missing_image"),
        ("", "wrong_type"),
        (7, "wrong_type"),
        (None, "wrong_type"),
        (["images/a.png"], "wrong_type"),
        ("\ud800.png", "bad_text"),
    ],
)
def test_what_is_not_inside(folder: Path, value: object, rule: str) -> None:
    with pytest.raises(FieldError) as error:
        path_inside(value, "images[1]", folder)
    assert (error.value.field, error.value.rule) == ("images[1]", rule)
    assert len(str(error.value)) < 320


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    (tmp_path / "new.staging").mkdir()  # of a call that was killed
    (tmp_path / "new.staging/rest").touch()
    with new_folder(tmp_path / "new") as staging:
        (staging / "a").write_text("a")
        assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]
    with pytest.raises(KeyError), new_folder(tmp_path / "other") as staging:
        (staging / "a").touch()
        raise KeyError
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError), new_folder(tmp_path / "file"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new"]
