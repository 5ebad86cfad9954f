"Solutions to the exercises, and in `checks` what checks a reader's answers."
