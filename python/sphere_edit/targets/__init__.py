"""Where the wanted changes of a batch come from. How they are solved for is `sphere_edit.methods`' part."""
