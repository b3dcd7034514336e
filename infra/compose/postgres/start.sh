# Makes the cluster on the first start, then becomes the server; by TCP nobody gets in without a password.
set -euo pipefail
as_postgres=(setpriv --reuid=postgres --regid=postgres --clear-groups)
install -d -o postgres -g postgres -m 0700 "$PGDATA"
install -d -o postgres -g postgres /var/run/postgresql
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  : "${POSTGRES_PASSWORD:?must be set}"
  # a pipe of root's cannot be opened by the user that initdb runs as
  install -o postgres -g postgres -m 0600 /dev/null /tmp/password
  printf '%s\n' "$POSTGRES_PASSWORD" > /tmp/password
  "${as_postgres[@]}" initdb --pgdata "$PGDATA" --username postgres --encoding UTF8 --locale C.UTF-8 \
    --auth-local trust --auth-host scram-sha-256 --pwfile /tmp/password > /dev/null
  rm /tmp/password
  echo 'host all all all scram-sha-256' >> "$PGDATA/pg_hba.conf"
fi
unset POSTGRES_PASSWORD
exec "${as_postgres[@]}" postgres -D "$PGDATA" -c listen_addresses='*'
