set -e;
d=/run/nutshell-agent;
mkdir -p $d;
grep -q " $d " /proc/mounts || mount -t tmpfs -o mode=0700,nosuid,nodev,size=16m nutshell-agent $d;
for b in /sys/block/vd*; do
  if [ "$(cat $b/serial)" = nutshell-agent ]; then cat /dev/$(basename $b) >$d/new; fi;
done;
chmod 700 $d/new;
mv -f $d/new $d/agent;
exec $d/agent serve
