#!/usr/bin/env bash
# Checks the dashboards against Grafana's own types, those of the version that docker-compose.yml names: every key, type and choice.
#   bash monitoring/check_schema.sh
# Needs node and npm, which fetches typescript and @grafana/schema into a folder that is removed again.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
version=$(sed -n 's|.*image: grafana/grafana:||p' "$here/docker-compose.yml")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
echo '{"private": true}' > package.json
npm install --silent --no-audit --no-fund --ignore-scripts typescript@5.9.3 "@grafana/schema@$version"
files=("$here/grafana/dashboards/"*.json)
for file in "${files[@]}"; do
  {
    echo 'import type { Dashboard } from "@grafana/schema";'
    printf 'export const dashboard = %s satisfies Dashboard;\n' "$(cat "$file")"
  } > "$(basename "$file" .json).ts"
done
npx tsc --noEmit --strict --skipLibCheck --moduleResolution node --target es2022 --module es2022 ./*.ts
echo "${#files[@]} dashboards fit Grafana $version"
