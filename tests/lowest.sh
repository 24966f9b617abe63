#!/bin/sh
# Writes a constraints file that pins every requirement of setup.cfg to its lower bound, and prints the file's name.
sed -n 's/^    \([A-Za-z_-]*\)>=\([0-9.]*\)$/\1==\2/p' setup.cfg > .venv-lowest/constraints.txt
echo .venv-lowest/constraints.txt
