from sphere_edit.cli.app import main

main()
