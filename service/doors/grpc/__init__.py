"""The Open Inference Protocol over gRPC: messages, metadata and status codes; what they mean is doors/oip's."""
