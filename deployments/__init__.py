"""The method as a service: Ray Serve deployments behind the OpenAI API."""
