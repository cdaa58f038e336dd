"""The `seuf` command, thin: it calls client, or seuf_core, api and worker for what runs on this machine."""
