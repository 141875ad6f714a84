#!/bin/sh
# Java and Maven: installed with apt-get by root on Debian and Ubuntu, named in one line elsewhere.
set -eu
wanted=""
command -v java >/dev/null 2>&1 || wanted="$wanted openjdk-17-jre-headless"
command -v mvn >/dev/null 2>&1 || wanted="$wanted maven"
[ -z "$wanted" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "installing$wanted ..."
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $wanted >/dev/null
else
  echo "missing:$wanted. Run: sudo apt-get install -y$wanted" >&2
  exit 1
fi
