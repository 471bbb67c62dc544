"""Compiles the CUDA sources as the program does, with NVRTC from a CUDA installation or from the wheel
nvidia-cuda-nvrtc (`pip install nvidia-cuda-nvrtc`; TTT_CUDA_LIBS names its folder if Python does not know it).

Usage: compile_sources.py FOLDER ARCHITECTURE...
Exits 0 if all compile and a broken source is refused, 1 if not, 77 if there is no NVRTC.
"""
import ctypes
import glob
import os
import re
import sys


def nvrtc():
    folders = [f for f in os.environ.get("TTT_CUDA_LIBS", "").split(":") if f]
    folders += [f for p in sys.path for f in glob.glob(os.path.join(p or ".", "nvidia", "*", "lib"))]
    names = [n for f in folders for n in sorted(glob.glob(os.path.join(f, "libnvrtc.so*")), reverse=True)]
    for name in [*names, "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def compile_source(library, source, architecture):
    """The log if NVRTC refuses the source, else None."""
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"ttt.cu", 0, None, None)
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode() if failed else None


def main():
    folder, architectures = sys.argv[1], sys.argv[2:]
    library = nvrtc()
    if library is None:
        print("no NVRTC: pip install nvidia-cuda-nvrtc, or set TTT_CUDA_LIBS")
        return 77
    # Each program is its sources in their order.
    with open(os.path.join(folder, "..", "compile.rs"), encoding="utf-8") as file:
        programs = [re.findall(r'include_str!\("source/([a-z_]+\.cu)"\)', part) for part in file.read().split("concat!(")[1:]]
    names = set(name for program in programs for name in program)
    missing = set(os.path.basename(n) for n in glob.glob(os.path.join(folder, "*.cu"))) - names
    if missing or not all(programs) or not programs:
        print(f"not part of a program: {sorted(missing)}")
        return 1
    text = {}
    for name in names:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            text[name] = file.read()
    for architecture in architectures:
        for program in programs:
            log = compile_source(library, "".join(text[name] for name in program), architecture)
            if log is not None:
                print(f"{program[-1]}, {architecture}:\n{log}")
                return 1
        if compile_source(library, text["common.cu"] + "\nthis is no CUDA\n", architecture) is None:
            print(f"{architecture}: a broken source was accepted")
            return 1
    print(f"{len(names)} sources in {len(programs)} programs for {', '.join(architectures)}")
    return 0


sys.exit(main())
