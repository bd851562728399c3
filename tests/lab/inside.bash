# The environment of every script in the lab machine: folders in memory, and the functions copy_to_memory and timed.
# Sourced by the script /out/.run of the lab, and by tests/deploy and first-run, which run on this host.

export LAB=1 TMPDIR=/run/tmp PATH=/run/bin:$PATH LD_LIBRARY_PATH=/run/lib
mkdir -p -m 1777 /run/tmp
mkdir -p /run/bin /run/lib

# copy_to_memory PROGRAM...: copies programs and their libraries into memory, where the search paths find them first.
# Reads over 9p are slow. With `lab -i` they also falsify measurements: the machine is idle during a read, and idle
# time counts up to the next timer.
copy_to_memory() {
  local program file library
  for program; do
    file=$(type -P "$program") || {
      echo "copy_to_memory: $program: not found" >&2
      return 1
    }
    [[ $file == /run/bin/* ]] || cp -L "$file" /run/bin/
    while read -r library; do
      [[ -e /run/lib/${library##*/} ]] || cp -L "$library" /run/lib/
    done < <(ldd "$file" 2>/dev/null | grep -o '/[^ )]*')
  done
  hash -r
}

# timed COMMAND...: runs it with its output in /run/last and prints how many microseconds it took, which are
# thousands of instructions with `lab -i`. Starts no other process.
timed() {
  local from=$EPOCHREALTIME to status=0
  "$@" >/run/last 2>&1 || status=$?
  to=$EPOCHREALTIME
  ((status == 0)) || {
    echo "failed with $status: $*" >&2
    tail -n 5 /run/last >&2
    return "$status"
  }
  echo $((${to/./} - ${from/./}))
}
export -f copy_to_memory timed

# With `lab -i` also the files that all processes read: the dynamic linker, /etc and common tools.
if [[ -n ${LAB_COUNTED:-} ]]; then
  linker=$(realpath /lib64/ld-linux-x86-64.so.2)
  cp "$linker" /run/linker
  mount --bind /run/linker "$linker"
  cp -a /etc /run/etc
  mount --bind /run/etc /etc
  copy_to_memory bash cat cp env grep head ls mkdir mount rm sed seq sh sleep sort tail true umount
  unset linker
fi
