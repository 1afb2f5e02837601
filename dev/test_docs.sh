#!/bin/sh
# The documents name what exists: README.md every option, target and script; MODEL.md only functions of the code.
passed=0 failed=0
verdict() { if [ "$2" = 0 ]; then passed=$((passed + 1)); else echo "FAIL $1"; failed=$((failed + 1)); fi; }

for option in $("${TRAINER:-./train_gpt_mhc}" --help | grep -o '^  --[a-z0-9-]*'); do
    grep -q -- "^  $option\b" README.md
    verdict "README.md lists $option" $?
done
for target in $(grep -o '`make [a-z-]*' README.md | sed 's/.* //' | sort -u); do
    grep -q "^[a-z -]*\b$target\b[a-z -]*:" Makefile
    verdict "README.md's make $target exists" $?
done
for file in $(grep -oE '\b(scripts|data|dev|host)/[a-z_./A-Z]*[a-zA-Z]' README.md MODEL.md | sed 's/.*md://' | sort -u); do
    [ -e "$file" ] || [ "$file" = data/fineweb ] || case $file in data/fineweb/*) true ;; *) false ;; esac
    verdict "$file, which a document names, exists" $?
done
for name in $(grep -oE '`[a-z0-9_]+\(?\)?`' MODEL.md | tr -d '`()' | grep -E '_[a-z]{2,}' | sort -u); do
    grep -qE "\b$name\b" train_gpt_mhc.c host/*.h data/*.h dev/bench.c test_gpt_mhc.c
    verdict "$name, which MODEL.md names, exists" $?
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
