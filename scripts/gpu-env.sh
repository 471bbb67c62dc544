# shellcheck shell=bash
# Lets `ttt` find NVIDIA's libraries where they came with Python packages (PyTorch, nvidia-*-cu13) and not with a CUDA
# installation. To be sourced:  . scripts/gpu-env.sh
#
# Puts every site-packages/nvidia/*/lib of python3 on LD_LIBRARY_PATH, and libnccl.so and libcudnn.so beside them: the
# wheels ship libnccl.so.2 and libcudnn.so.9 alone, names under which the bindings do not look first, so that an older
# library of the system would be taken.

ttt_gpu_env() {
    local found links folder library plain
    if ! command -v python3 >/dev/null; then
        echo "gpu-env: no python3 here; nothing changed" >&2
        return 1
    fi
    found=$(
        python3 - <<'PYTHON'
import pathlib, sys

for root in dict.fromkeys(sys.path):
    for folder in sorted(pathlib.Path(root or ".").resolve().glob("nvidia/*/lib")):
        print(folder)
PYTHON
    ) || return 1
    if [ -z "$found" ]; then
        echo "gpu-env: python3 has no nvidia packages; nothing changed" >&2
        return 1
    fi
    while IFS= read -r folder; do
        # A second sourcing adds nothing.
        case ":${LD_LIBRARY_PATH:-}:" in *":$folder:"*) continue ;; esac
        LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
        for library in libnccl.so.2 libcudnn.so.9; do
            plain=${library%.*}
            if [ -e "$folder/$library" ] && [ ! -e "$folder/$plain" ]; then
                links=$(mktemp -d) || return 1
                ln -s "$folder/$library" "$links/$plain"
                LD_LIBRARY_PATH=$LD_LIBRARY_PATH:$links
            fi
        done
    done <<FOUND
$found
FOUND
    export LD_LIBRARY_PATH
}

ttt_gpu_env
