# Makes the cluster on the first start, then becomes the server; by TCP nobody gets in without a password.
set -euo pipefail
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  : "${POSTGRES_PASSWORD:?must be set}"
  chmod 0700 "$PGDATA"
  initdb --pgdata "$PGDATA" --username postgres --encoding UTF8 --locale C.UTF-8 --auth-local trust \
    --auth-host scram-sha-256 --pwfile <(printf '%s\n' "$POSTGRES_PASSWORD") > /dev/null
  echo 'host all all all scram-sha-256' >> "$PGDATA/pg_hba.conf"
fi
unset POSTGRES_PASSWORD
exec postgres -D "$PGDATA" -c listen_addresses='*'
