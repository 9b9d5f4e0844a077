#!/bin/bash
# A merge in shares, one for each host, by nothing but ssh:
#
#     BASE=/shared/base ADAPTER=/shared/adapter OUTPUT=/shared/merged ./ssh.sh node1 node2 node3
#
# The paths are on a file system that all hosts share, loratool is on the PATH of a shell that ssh
# starts there, and ssh asks for no password. What a host says is in loratool-HOST.log here.
# If a host was lost, run it again without that one: what is finished is not made twice.

set -uo pipefail

base=${BASE:-/shared/base}
adapter=${ADAPTER:-/shared/adapter}
output=${OUTPUT:-/shared/merged}

if [ "$#" -eq 0 ]; then
    echo "usage: $0 HOST..." >&2
    exit 2
fi

number=0
pids=()
for host in "$@"; do
    number=$((number + 1))
    # Quoted once more, because ssh hands one line to a shell over there.
    command=$(printf '%q ' loratool merge "$base" "$adapter" -o "$output" --worker "$number/$#")
    ssh -n -o BatchMode=yes -o ServerAliveInterval=30 "$host" "$command" \
        > "loratool-$host.log" 2>&1 &
    pids+=("$!")
done

failed=()
for host in "$@"; do
    wait "${pids[0]}" || failed+=("$host")
    pids=("${pids[@]:1}")
done

if [ "${#failed[@]}" -ne 0 ]; then
    echo "failed on: ${failed[*]}; see loratool-HOST.log, then run this again" >&2
    exit 1
fi
