#!/usr/bin/env python3
"""Compiles the CUDA kernels to PTX with NVIDIA's runtime compiler: nvrtc.py LIBRARY SOURCE OUTPUT [option ..]

NVRTC is the compiler of the CUDA toolkit as one library; it needs no CUDA headers, and neither do
the kernels. Exits with its log on an error; warnings are errors.
"""

import ctypes
import sys


def main():
    library, source, output, *options = sys.argv[1:]
    nvrtc = ctypes.CDLL(library)

    def call(name, *arguments):
        status = getattr(nvrtc, name)(*arguments)
        return status

    def text(size_name, text_name):
        size = ctypes.c_size_t()
        call(size_name, program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(text_name, program, buffer)
        return buffer.value.decode()

    with open(source, "rb") as file:
        code = file.read()
    program = ctypes.c_void_p()
    if call("nvrtcCreateProgram", ctypes.byref(program), code, b"kernels.cu", 0, None, None):
        sys.exit("error: nvrtcCreateProgram failed")
    list_of_options = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    status = call("nvrtcCompileProgram", program, len(options), list_of_options)
    log = text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").strip()
    if status or log:
        sys.exit(f"{log}\nerror: {source} does not compile cleanly")
    with open(output, "w") as file:
        file.write(text("nvrtcGetPTXSize", "nvrtcGetPTX"))


if __name__ == "__main__":
    main()
