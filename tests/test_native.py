"""Compiling the C++ files on first use, and who goes without: always the same, only slower."""

import os
import stat

import pytest
from needs import needs_compiler

from quietstar.native import library
from quietstar.native.library import COMPILERS, find_compiler, load_library


def compiler_script(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_compiler
def test_a_library_is_compiled_once(fresh, monkeypatch):
    assert load_library() is not None
    (made,) = fresh.iterdir()  # nothing half done lies beside it
    load_library.cache_clear()
    monkeypatch.setattr(library.subprocess, "run", None)
    assert load_library() is not None
    assert list(fresh.iterdir()) == [made]


def test_the_environment_can_leave_it_out(fresh, monkeypatch):
    monkeypatch.setenv("QUIETSTAR_NATIVE", "0")
    assert load_library() is None
    assert not fresh.exists()


def test_without_a_compiler_torch_does_it(fresh, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level("INFO", logger="quietstar.native.library"):
        assert load_library() is None
    assert "no C++ compiler: torch's operators do what compiled loops would" in caplog.text


def test_a_compiler_that_fails_is_told_of_once(fresh, monkeypatch, caplog, tmp_path):
    script = compiler_script(tmp_path / "cxx", "echo 'x.cpp: error: no OpenMP here' >&2; exit 1")
    monkeypatch.setenv("CXX", script)
    assert find_compiler() == (script,)
    assert load_library() is None
    assert load_library() is None
    (record,) = caplog.records
    assert "could not be compiled (x.cpp: error: no OpenMP here)" in record.message


def test_what_a_compiler_left_may_be_no_library(fresh, monkeypatch, caplog, tmp_path):
    body = 'for last; do :; done; echo nonsense > "$last"'
    monkeypatch.setenv("CXX", compiler_script(tmp_path / "cxx", body))
    assert load_library() is None
    assert "could not be compiled" in caplog.text


@needs_compiler
@pytest.mark.parametrize("contents", [b"", b"nonsense"])
def test_a_damaged_library_is_compiled_again(fresh, caplog, contents):
    made = library._compiled(find_compiler())
    made.write_bytes(contents)
    assert load_library() is not None
    assert made.stat().st_size > len(contents)
    assert not caplog.records


def test_a_compiler_that_says_nothing_is_told_of_too(fresh, monkeypatch, caplog, tmp_path):
    script = compiler_script(tmp_path / "cxx", "exit 3")
    monkeypatch.setenv("CXX", script)
    assert load_library() is None
    assert f"({script} ended with exit code 3)" in caplog.text
    assert "CXX names another compiler" in caplog.text


def test_the_compiler_may_have_arguments(monkeypatch, tmp_path, caplog):
    script = compiler_script(tmp_path / "ccache", "exit 0")
    monkeypatch.setenv("CXX", f"{script} g++ -O2")
    assert find_compiler() == (script, "g++", "-O2")
    monkeypatch.setenv("CXX", "/nowhere/g++ -O2")
    find_compiler()
    assert "no compiler CXX=/nowhere/g++ -O2; looking for others" in caplog.text
    monkeypatch.setenv("CXX", "g++ '-O2")
    find_compiler()
    assert "CXX=g++ '-O2 cannot be read (No closing quotation)" in caplog.text


@needs_compiler
def test_no_folder_to_keep_it_in(fresh, caplog):
    fresh.write_text("a file, no folder", encoding="utf-8")
    assert load_library() is None
    assert "could not be compiled" in caplog.text


def test_the_usual_compilers_are_looked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() is None
    for name in reversed(COMPILERS):
        compiler_script(tmp_path / name, "exit 0")
        assert find_compiler() == (str(tmp_path / name),)
    assert os.environ["PATH"] == str(tmp_path)
