"""Where native code is compiled: what is kept for the next export, and headers of our own."""

from __future__ import annotations

import os
import re
import stat
import subprocess

import pytest
from torch._inductor import codecache, cpp_builder
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

from precast.exporter.backends.aoti import workspace
from precast.exporter.backends.aoti.workspace import FOLDER, compiler_workspace

DEVICES = [
    *("cpu", "cuda", "cuda:0", "cuda:12", "xpu", "mps:1"),
    *("", "tpu", "cpu:", "cpu:x", "cuda:1x", " cpu", "cpus", "cuda:0:1"),
]
PROGRAM = """
#include <iostream>
#include <regex>
int main() {
  std::regex pattern("(cpu|cuda|xpu|mps)(:([0-9]+))?");
  for (std::string device; std::getline(std::cin, device);) {
    std::smatch found;
    const bool matched = std::regex_match(device, found, pattern);
    std::cout << matched;
    if (matched) std::cout << found[1].str() << "," << found[3].matched << found[3].str();
    std::cout << "\\n";
  }
}
"""


@pytest.fixture
def default(monkeypatch, tmp_path):
    """Inductor's folder is not set; precast's home is new."""
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setenv("PRECAST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_headers_and_pieces_are_kept_where_nobody_else_writes(default):
    before = dict(os.environ), codecache._HEADER_DIR, CppWrapperCpu.generate_input_output_runtime_checks
    with compiler_workspace() as kept:
        assert kept == default / "compiler"
        assert stat.S_IMODE(kept.stat().st_mode) == 0o700
        assert str(kept / "headers") == codecache._HEADER_DIR
        assert os.environ[FOLDER] != str(kept)
    assert before == (dict(os.environ), codecache._HEADER_DIR, CppWrapperCpu.generate_input_output_runtime_checks)


def test_without_a_home_they_are_gone_after_the_export(default, monkeypatch):
    monkeypatch.setenv("PRECAST_HOME", os.devnull + "/precast")
    with compiler_workspace() as kept:
        assert str(kept) == os.environ[FOLDER]
    assert not kept.exists()


def test_in_a_folder_that_the_user_set_all_stays(monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with compiler_workspace() as kept:
        assert (kept, os.environ[FOLDER]) == (tmp_path, str(tmp_path))


def test_the_users_headers_come_after_ours(monkeypatch):
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/opt/mine")
    with compiler_workspace():
        assert os.environ["CPLUS_INCLUDE_PATH"] == os.pathsep.join([str(workspace._LEAN), "/opt/mine"])


def test_devices_are_read_as_by_the_standard_library(tmp_path):
    (tmp_path / "program.cpp").write_text(PROGRAM)
    said = []
    for flags in ([], ["-I", str(workspace._LEAN)]):
        command = [cpp_builder.get_cpp_compiler(), "-std=c++20", *flags, "program.cpp", "-o", "program"]
        subprocess.run(command, check=True, cwd=tmp_path)
        done = subprocess.run(
            ["./program"], check=True, cwd=tmp_path, input="\n".join(DEVICES) + "\n", capture_output=True, text=True
        )
        said.append(done.stdout.splitlines())
    assert said[0] == said[1]
    assert said[1][:3] == ["1cpu,0", "1cuda,0", "1cuda,10"]


def test_no_other_pattern_is_read(tmp_path):
    (tmp_path / "program.cpp").write_text(re.sub(r"\(cpu\|", "(", PROGRAM))
    command = [cpp_builder.get_cpp_compiler(), "-std=c++20", "-I", str(workspace._LEAN), "program.cpp", "-o", "program"]
    subprocess.run(command, check=True, cwd=tmp_path)
    done = subprocess.run(["./program"], check=False, cwd=tmp_path, input="cuda\n", capture_output=True, text=True)
    assert done.returncode
    assert "another pattern" in done.stderr
