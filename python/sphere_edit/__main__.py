from sphere_edit.cli import main

main()
