// Cross entropy forward, a token's logits x at a time.
//   m = max_c x_c,   logsum = log sum_c exp(x_c - m),   loss = logsum + (m - x_target)
