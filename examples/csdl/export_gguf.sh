#!/bin/sh
# The merged model of phase 1 as GGUF files, F16 to Q4_K_S, and their table: export_gguf.sh [RECIPE] [OUT]
set -e
here=$(dirname "$0")
exec abi-train phases "${1:-$here/csdl-14b.yaml}" --only gguf -o "${2:-models}"
