# Makes the store on the first start, then runs monitor, OSD and gateway until one of them ends.
# cephx stays on, for the gateway hangs without it; the OSD's keyring is its own, for a global one breaks its mkfs; every
# client call has a limit, for they block for ever while the monitor is away; and tcp_nodelay saves 40 ms a small read.
set -euo pipefail
: "${AWS_ACCESS_KEY_ID:?must be set}" "${AWS_SECRET_ACCESS_KEY:?must be set}"
root=/data
export CEPH_CONF=$root/ceph.conf
ask() { timeout 30 ceph --connect-timeout 5 "$@" < /dev/null; }
until_says() { # expected, words of the question
  local expected=$1; shift
  for _ in $(seq 60); do ask "$@" 2>&1 | grep -q "$expected" && return 0; sleep 0.5; done
  echo "no '$expected' from ceph $*" >&2; exit 1
}

mkdir -p $root/{mon,osd/0,log,rgw} /run/ceph
fresh=false
if [ ! -s $root/made ]; then
  fresh=true
  rm -rf $root/mon $root/osd $root/rgw; mkdir -p $root/{mon,osd/0,rgw}
  fsid=$(uuidgen)
  cat > $CEPH_CONF <<CONF
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:3300]
keyring = $root/keyring
run dir = /run/ceph
admin socket = /run/ceph/\$name.asok
log file = $root/log/\$name.log
crash dir = $root
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon max pg per osd = 1000
osd crush chooseleaf type = 0
mon data avail crit = 1
mon data avail warn = 2
auth allow insecure global id reclaim = false
[mon]
mon data = $root/mon/\$id
mon initial members = a
[osd]
osd data = $root/osd/\$id
keyring = $root/osd/\$id/keyring
osd objectstore = bluestore
bluestore block size = 10737418240
bluestore block create = true
osd memory target = 939524096
[client]
rgw frontends = beast port=8333 tcp_nodelay=1
rgw data = $root/rgw
CONF
  ceph-authtool -C $root/keyring --gen-key -n mon. --cap mon 'allow *' > /dev/null
  ceph-authtool $root/keyring --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' > /dev/null
  monmaptool --create --clobber --addv a '[v2:127.0.0.1:3300]' --fsid "$fsid" /tmp/monmap > /dev/null
  ceph-mon --mkfs -i a --monmap /tmp/monmap --keyring $root/keyring
fi

trap 'kill $(jobs -p) 2> /dev/null; wait; exit 0' TERM INT
ceph-mon -f -i a > $root/log/mon.out 2>&1 &
until_says quorum mon stat
if $fresh; then
  key=$(ceph-authtool --gen-print-key)
  id=$(uuidgen)
  echo "{\"cephx_secret\":\"$key\"}" | timeout 30 ceph --connect-timeout 5 osd new "$id" 0 -i - > /dev/null
  ceph-authtool -C $root/osd/0/keyring --name osd.0 --add-key "$key" > /dev/null
  ceph-osd -i 0 --mkfs --osd-uuid "$id" > $root/log/mkfs.out 2>&1
  ask auth get-or-create client.rgw.a mon 'allow rw' osd 'allow rwx' -o $root/rgw/keyring
fi
ceph-osd -f -i 0 > $root/log/osd.out 2>&1 &
until_says '1 up' osd stat
user=(--uid athanor --access-key "$AWS_ACCESS_KEY_ID" --secret-key "$AWS_SECRET_ACCESS_KEY")
if $fresh; then
  timeout 60 radosgw-admin user create "${user[@]}" --display-name athanor < /dev/null > /dev/null 2> $root/log/user.out
else
  timeout 60 radosgw-admin user modify "${user[@]}" < /dev/null > /dev/null 2> $root/log/user.out
fi
date > $root/made
radosgw -f -n client.rgw.a -k $root/rgw/keyring > $root/log/rgw.out 2>&1 &
wait -n
echo "a daemon ended; see $root/log" >&2
exit 1
