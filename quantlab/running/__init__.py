"""One job, and many of them: here, apart, on engines, resumed, reproduced."""
