#!/bin/sh
# The merged model of phase 1 as GGUF files, F16 to Q4_K_S, and their table: export_gguf.sh [RECIPE] [-o OUT] [--dry-run]
set -e
case "${1:--}" in -*) set -- "$(dirname "$0")/csdl-14b.yaml" "$@" ;; esac
exec abi-train phases "$@" --only gguf
