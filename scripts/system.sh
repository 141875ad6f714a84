#!/bin/sh
# What Python packages do not bring: Java 17 or later, Maven, and venv where Debian splits it off.
# Installed with apt-get by root, named in a line elsewhere. PYTHON is the interpreter that make found.
set -eu
oldest=17

lacks_java() {
  java=${JAVA_HOME:+$JAVA_HOME/bin/}java # as the library looks for it
  command -v "$java" >/dev/null 2>&1 || java=java
  version=$("$java" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1)
  [ "${version:-0}" -lt "$oldest" ]
}
lacks_venv() { # Debian's Python has the module venv and lacks the ensurepip that it calls
  [ -n "${PYTHON:-}" ] && ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null
}

wanted=""
if lacks_java; then wanted="$wanted java"; fi
if ! command -v mvn >/dev/null 2>&1; then wanted="$wanted maven"; fi
if lacks_venv; then wanted="$wanted venv"; fi
[ -z "$wanted" ] && exit 0

if ! command -v apt-get >/dev/null 2>&1; then
  echo "missing:$wanted. Install Java $oldest or later, Maven and Python's venv as this system does it, then try again" >&2
  exit 1
fi
if [ "$(id -u)" = 0 ]; then apt-get update -qq; fi
packages=""
for each in $wanted; do
  case $each in
    java)
      each=openjdk-17-jre-headless
      if [ -z "$(apt-cache show "$each" 2>/dev/null)" ]; then each=default-jre-headless; fi ;;
    venv) each=$("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])') ;;
  esac
  packages="$packages $each"
done
if [ "$(id -u)" = 0 ]; then
  echo "installing$packages ..."
  # shellcheck disable=SC2086 # several packages
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $packages >/dev/null
else
  echo "missing:$wanted. Run: sudo apt-get update && sudo apt-get install -y$packages" >&2
  exit 1
fi
