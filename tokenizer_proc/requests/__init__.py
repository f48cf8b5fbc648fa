"""The handling of one request from validation to its last token: parameters, streams, output processing."""
