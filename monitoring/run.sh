#!/usr/bin/env bash
# Prometheus and Alertmanager without Docker, for the runs under a run root, on this machine's loopback address:
#   bash monitoring/run.sh RUN_ROOT [STATE]
# STATE (default: RUN_ROOT/prometheus-state) keeps the series. On Debian: apt-get install prometheus prometheus-alertmanager.
# PROMETHEUS_PORT and ALERTMANAGER_PORT change the ports 9090 and 9093. Ctrl-C ends all of it.
set -euo pipefail
root=$(realpath "${1:?usage: run.sh RUN_ROOT [STATE]}")
state=$(realpath -m "${2:-$root/prometheus-state}")
here=$(dirname "$(realpath "$0")")
python="$here/../.venv/bin/python"
[ -x "$python" ] || python=python3
port=${PROMETHEUS_PORT:-9090} alerts=${ALERTMANAGER_PORT:-9093}

mkdir -p "$root/prometheus" "$state"
cp "$here/alerts.yml" "$here/alertmanager.yml" "$state/"
sed "s/127.0.0.1:9093/127.0.0.1:$alerts/" "$here/prometheus.yml" > "$state/prometheus.yml"
ln -sfn "$root/prometheus" "$state/targets"

trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
if command -v prometheus-alertmanager >/dev/null; then
  prometheus-alertmanager --config.file="$state/alertmanager.yml" --storage.path="$state/alertmanager" \
    --web.listen-address="127.0.0.1:$alerts" --cluster.listen-address= --log.level=warn &
else
  echo "run.sh: no prometheus-alertmanager here: alerts are shown by Prometheus alone" >&2
fi
# Nobody else removes the files of runs that were killed.
PYTHONPATH="$here/.." "$python" -m nepa_dist.metrics targets --watch "$root" &
prometheus --config.file="$state/prometheus.yml" --storage.tsdb.path="$state/data" --storage.tsdb.retention.time=180d \
  --web.listen-address="127.0.0.1:$port" --log.level=warn &
echo "run.sh: http://127.0.0.1:$port shows the runs under $root"
wait -n
