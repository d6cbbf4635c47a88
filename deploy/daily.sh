#!/bin/sh
# Bring the live run to today's log: prepare, update, evaluate, promote. Run it by the timer
# (pagellm-daily.timer) or by cron, in the directory that holds data/ and runs/:
#
#   17 3 * * * cd /srv/shop && PATH=/srv/shop/venv/bin:$PATH ./daily.sh exports >>daily.log 2>&1
#
# $1       directory of the whole log up to now, as files
# STEPS    steps of the fit (50)
# KEEP     newest data sets and runs that are kept (8); the live run and its data always are
#
# A step that fails ends the script, and yesterday's run stays live. The same command carries on.
set -eu
raw=${1:?usage: daily.sh DIRECTORY, the whole log up to now} day=$(date +%F)
live=$(readlink runs/live) || {
    echo "daily: runs/live is no link to a run; make it with: pagellm promote RUN" >&2
    exit 2
}
if [ "$live" = "$day" ]; then
    echo "daily: $day is live already"
    exit 0
fi
pagellm prepare --dataset "$day" --raw "$raw" --split temporal
pagellm update --from "$live" --data "$day" --out "$day" --steps "${STEPS:-50}"
pagellm evaluate --dataset "$day" --run "$day"
# Scored on another day's rows: only a drop of more than 5% says that something went wrong.
pagellm promote "$day" --worse 0.05
for old in $(ls -d data/20??-??-?? | sort -r | tail -n +$((${KEEP:-8} + 1))); do
    case $old in "data/$live" | "data/$day") continue ;; esac
    rm -rf "$old" "runs/${old#data/}" # a day that failed has data and no run
done
pagellm doctor
