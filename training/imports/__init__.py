"""Networks that other frameworks trained, onto training's layers."""
